from hypothesis import settings

settings.register_profile("algorithms", deadline=None, max_examples=60)
