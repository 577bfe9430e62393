"""everything that one imports from `papers10.neoverse`, loaded when it is used"""
