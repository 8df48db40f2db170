"""Encode, denoise, decode, score: functions of a batch that hold ready model parts."""
