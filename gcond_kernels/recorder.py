"""Temporary stand-in."""


class Recorder:
    def __init__(self, tasks, thresholds, steps):
        pass

    def record(self, *args):
        pass

    def advise(self):
        return ""
