from real_data import real_data_environment

real_data_environment()  # before a test file looks for it while it is imported
