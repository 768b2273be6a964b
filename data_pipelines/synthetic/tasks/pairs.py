"""Questions about two images."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.tasks.naming import alone
from data_pipelines.synthetic.vocabulary import KINDS, NAMES

BOTH = ("What do the two pictures show?", "Name both pictures.", "What is in each picture?")
SAME = ("Do both pictures show the same?", "Are the two pictures of the same thing?", "Same thing in both?")


def pair(sampler: SceneSampler) -> Example:
    """The names of the objects in both images, in order."""
    scenes = alone(sampler, KINDS), alone(sampler, KINDS)
    answer = " and ".join(scene.objects[0].sprite.name for scene in scenes)
    return Example(scenes, ((sampler.choice(BOTH), answer),))


def same(sampler: SceneSampler) -> Example:
    """Whether both images show objects of the same name. Half of the different pairs are of the same kind."""
    kind, name = sampler.kind_and_name()
    first = alone(sampler, (kind,), name)
    answer = "yes" if sampler.bernoulli(0.5) else "no"
    if answer == "no":
        if not sampler.bernoulli(0.5):
            kind = sampler.choice([other for other in KINDS if other != kind])
        name = sampler.choice([other for other in NAMES[kind] if other != name])
    question = sampler.choice(SAME)
    return Example((first, alone(sampler, (kind,), name)), ((question, answer),))
