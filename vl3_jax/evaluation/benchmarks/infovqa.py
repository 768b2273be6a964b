"""InfographicVQA: short answers about infographics."""

from vl3_jax.evaluation.benchmark import Item, PaperRow
from vl3_jax.evaluation.benchmarks.docvqa import PROMPT, DocVQA


class InfoVQA(DocVQA):
    """ANLS, as DocVQA."""

    name, title, size = "InfoVQA", "InfoVQA", 2801
    layout = "infographicsVQA_val_v1.0_withQT.json (infographicsVQA_test_v1.0.json for InfoVQA@test)\nimages/"
    rows = (PaperRow("InfoVQA test", ("val",)),)
    source = "www.docvqa.org (Robust Reading Competition), task 3: Infographics VQA"

    def items(self, data):
        file = {"val": "infographicsVQA_val_v1.0_withQT.json", "test": "infographicsVQA_test_v1.0.json"}[self.split]
        return [
            Item(
                str(row["questionId"]),
                [{"type": "image", "image": data.path("images", row["image_local_name"])}],
                PROMPT.format_map(row),
                {"target": row.get("answers"), "task_type": self.split},
            )
            for row in data.json(file)["data"]
        ]
