"""Flow matching shared by chapters: schedules, samplers, guidance, transformer blocks"""
