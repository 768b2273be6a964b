"""Files and folders on disks and in buckets: paths and their errors, progress bars, journals and resumable jobs.

Everything that keeps something, from a checkpoint to the answers of an evaluation, is built on these modules; they know
none of it.
"""
