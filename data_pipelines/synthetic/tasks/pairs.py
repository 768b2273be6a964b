"""Questions about two pictures."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.scenes import Scene
from data_pipelines.synthetic.tasks.naming import alone
from data_pipelines.synthetic.vocabulary import KINDS, NAMES

BOTH = ("What do the two pictures show?", "Name both pictures.", "What is in each picture?")
SAME = ("Do both pictures show the same?", "Are the two pictures of the same thing?", "Same thing in both?")


def pair(sampler: SceneSampler) -> Example:
    """The names of both, in order."""
    scenes = alone(sampler, KINDS), alone(sampler, KINDS)
    answer = " and ".join(scene.placed[0].sprite.name for scene in scenes)
    return _of_two(sampler.pick(BOTH), answer, scenes)


def same(sampler: SceneSampler) -> Example:
    """Whether both show a thing of the same name; where not, it is of the same kind as often as not."""
    kind, name = sampler.kind_and_name()
    first = alone(sampler, (kind,), name)
    if sampler.chance(0.5):
        return _of_two(sampler.pick(SAME), "yes", (first, alone(sampler, (kind,), name)))
    other_kind = kind if sampler.chance(0.5) else sampler.pick([one for one in KINDS if one != kind])
    other = sampler.pick([one for one in NAMES[other_kind] if one != name])
    return _of_two(sampler.pick(SAME), "no", (first, alone(sampler, (other_kind,), other)))


def _of_two(question: str, answer: str, scenes: tuple[Scene, Scene]) -> Example:
    return Example(scenes, ((question, answer),), {"answer": answer, "media": [scene.facts() for scene in scenes]})
