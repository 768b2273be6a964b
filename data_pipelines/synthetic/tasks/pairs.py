"""Questions about two pictures."""

from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Still
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.tasks.naming import alone
from data_pipelines.synthetic.vocabulary import KINDS, NAMES

BOTH = ("What do the two pictures show?", "Name both pictures.", "What is in each picture?")
SAME = ("Do both pictures show the same?", "Are the two pictures of the same thing?", "Same thing in both?")


def pair(studio: Studio) -> Example:
    """The names of both, in order."""
    stills = alone(studio, KINDS), alone(studio, KINDS)
    answer = " and ".join(still.placed[0].thing.name for still in stills)
    return _of_two(studio.pick(BOTH), answer, stills)


def same(studio: Studio) -> Example:
    """Whether both show a thing of the same name; where not, it is of the same kind as often as not."""
    kind, name = studio.kind_and_name()
    first = alone(studio, (kind,), name)
    if studio.chance(0.5):
        return _of_two(studio.pick(SAME), "yes", (first, alone(studio, (kind,), name)))
    other_kind = kind if studio.chance(0.5) else studio.pick([one for one in KINDS if one != kind])
    other = studio.pick([one for one in NAMES[other_kind] if one != name])
    return _of_two(studio.pick(SAME), "no", (first, alone(studio, (other_kind,), other)))


def _of_two(question: str, answer: str, stills: tuple[Still, Still]) -> Example:
    return Example(stills, ((question, answer),), {"answer": answer, "media": [still.facts() for still in stills]})
