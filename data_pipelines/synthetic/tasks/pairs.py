"""Questions about two images."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import Scene
from data_pipelines.synthetic.tasks.naming import alone
from data_pipelines.synthetic.vocabulary import KINDS, NAMES

BOTH = ("What do the two pictures show?", "Name both pictures.", "What is in each picture?")
SAME = ("Do both pictures show the same?", "Are the two pictures of the same thing?", "Same thing in both?")


def pair(sampler: SceneSampler) -> Example:
    """The names of the objects in both images, in order."""
    scenes = alone(sampler, KINDS), alone(sampler, KINDS)
    answer = " and ".join(scene.objects[0].sprite.name for scene in scenes)
    return _example(sampler.choice(BOTH), answer, scenes)


def same(sampler: SceneSampler) -> Example:
    """Whether both images show objects of the same name. Half of the different pairs are of the same kind."""
    kind, name = sampler.kind_and_name()
    first = alone(sampler, (kind,), name)
    if sampler.bernoulli(0.5):
        return _example(sampler.choice(SAME), "yes", (first, alone(sampler, (kind,), name)))
    other_kind = (
        kind if sampler.bernoulli(0.5) else sampler.choice([candidate for candidate in KINDS if candidate != kind])
    )
    other_name = sampler.choice([candidate for candidate in NAMES[other_kind] if candidate != name])
    return _example(sampler.choice(SAME), "no", (first, alone(sampler, (other_kind,), other_name)))


def _example(question: str, answer: str, scenes: tuple[Scene, Scene]) -> Example:
    return Example(scenes, ((question, answer),), {"answer": answer, "media": [scene.facts() for scene in scenes]})
