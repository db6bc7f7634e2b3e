"""Where rewards come from: functions, reward models, judges, servers, and tests that run a
completion's code.
"""
