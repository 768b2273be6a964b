"""Generated questions about real images, with known answers: training and test data of the bundled model `nano`.

registry.example("digit", "test", seed=7, number=0)     one sample: media (rendered lazily), question, answer, reference
dataset_writer.write("folder", "test", {"digit": 200}, seed=7)    data sets on disk, in the ordinary annotation format
source.SyntheticSource("synthetic://train/stage2?count=100000")   the same samples as a record source, without files
scoring.evaluate("digit", answers, references)          score, and the score of the best constant answer
"""
