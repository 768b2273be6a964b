"""Stage 2, vision-language alignment: detailed captions, text in images, documents, regions (paper, table 2)."""

from data_pipelines.mixtures import Group, mixture

GROUPS = [
    Group(
        "scene image",
        12_560_000,
        [
            "VL3-Syn7M-detailed",
            "Objects365-Recap",
            "SA-1B-Recap",
            "COCO2017-Recap",
            "ShareGPT4o",
            "TextCaps",
            "ShareGPT4V",
            "DenseFusion",
            "LLaVA-ReCap-LCS-558K",
        ],
        {"VL3-Syn7M-detailed": 7_000_000, "LLaVA-ReCap-LCS-558K": 558_000},
    ),
    Group(
        "scene text",
        4_690_000,
        ["Laion-OCR", "COCO-Text", "TextOCR", "BLIP3-OCR-Recap", "LSVT", "ReCTS"],
        {"Laion-OCR": 3_000_000},
    ),
    Group(
        "document",
        2_680_000,
        ["SynthDoG-EN", "SynthDoG-ZH", "UReader-TR", "FUNSD", "DUDE", "Vary-600k", "pdfa-eng-wds", "idl-wds"],
        {"Vary-600k": 600_000},
    ),
    Group("chart", 40_000, ["Chart-to-Text"], {"Chart-to-Text": 40_000}),
    Group(
        "fine-grained",
        1_000_000,
        ["Osprey-724K", "MDVP-Data", "ADE20K-Recap", "Objects365", "Flickr-30K", "GranD"],
        {"Osprey-724K": 724_000},
    ),
    Group(
        "text",
        6_250_000,
        ["Evol-Instruct-143K", "Infinity-Instruct-code", "Infinity-Instruct-commonsense", "Infinity-Instruct-math"],
        {"Evol-Instruct-143K": 143_000},
    ),
]


def get_config():
    """27.22 million samples; images at merge size 1, so 16,384 patches fill a row."""
    return mixture(GROUPS, patches=16_384, prune_threshold=None)
