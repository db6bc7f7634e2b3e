"""Where rewards come from: functions, models, judges, addresses, and code that is run."""
