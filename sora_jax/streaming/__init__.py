"""Running a model that is larger than the memory it may use: its layers are read while the ones before them compute."""
