"""Stage 3, multi-task fine-tuning: instructions on images, and the first videos (paper, table 3)."""

from data_pipelines.mixtures import Group, mixture

VIDEO_GENERAL = [
    "LLaVA-Video-178K",
    "ShareGPT4o-Video",
    "FineVideo",
    "CinePile",
    "ShareGemini-k400",
    "ShareGemini-WebVID",
    "VCG-Human",
    "VCG-Plus",
    "VideoLLaMA2-in-house",
    "temporal-grounding-in-house",
]
GROUPS = [
    Group(
        "general",
        9_870_000,
        [
            "LLaVA-SFT-665K",
            "LLaVA-OV-SI",
            "Cambrian-cleaned",
            "Pixmo-docs",
            "Pixmo-cap",
            "Pixmo-points",
            "Pixmo-cap-qa",
            "Pixmo-ask-model-anything",
        ],
        {"LLaVA-SFT-665K": 665_000},
    ),
    Group("document", 1_310_000, ["DocVQA", "Docmatix"]),
    Group(
        "chart", 1_000_000, ["ChartQA", "MMC-Instruction", "DVQA", "LRV-Instruction", "ChartGemma", "InfoVQA", "PlotQA"]
    ),
    Group("ocr", 830_000, ["MultiUI", "OCR-in-house"]),
    Group("grounding", 500_000, ["RefCOCO", "VCR", "grounding-in-house"]),
    Group("multi-image", 410_000, ["Demon-Full", "Contrastive-Caption"]),
    Group("text", 2_210_000, ["Magpie", "Magpie-Pro", "Synthia", "Infinity-Instruct-subjective", "NuminaMath"]),
    Group("video", 2_920_000, VIDEO_GENERAL),
]


def get_config():
    """19.05 million samples; images at merge size 1, videos at 2."""
    return mixture(GROUPS)
