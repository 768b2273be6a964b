"""The words of the synthetic questions: names of objects, colours, positions, directions."""

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NAMES = {"digit": DIGITS, "fashion": FASHION, "shape": SHAPES}
KINDS = tuple(NAMES)
ALL_NAMES = DIGITS + FASHION + SHAPES

COLOURS = {
    "red": (225, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (40, 175, 60),
    "blue": (50, 95, 240),
    "purple": (155, 60, 205),
    "white": (245, 245, 245),
}
VISIBLE_ON_LIGHT = ("red", "green", "blue", "purple")  # colours that are visible on a light background

# In reading order: the index is row * 3 + column.
POSITIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNTS = (1, 2, 3, 4, 5)


def with_article(words: str) -> str:
    """Puts the indefinite article before a noun phrase: 'a 7', 'an 8', 'an orange bag'; trousers take none."""
    if words.split()[-1] == "trousers":
        return words
    return f"{'an' if words[0] in 'aeio8' else 'a'} {words}"
