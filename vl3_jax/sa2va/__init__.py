"""Sa2VA (arXiv 2501.04001) on VideoLLaMA3: a language model whose answers point at objects, and SAM-2 that draws them.

A token `[SEG]` of an answer stands for an object. Its hidden state, through two layers, prompts the mask decoder.
`templates` asks, `grounded_text` reads answers, `sa2va_model` joins the two models.
"""
