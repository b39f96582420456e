"""The CPU engine beside other libraries: search, build, memory, growth, where the time goes."""
