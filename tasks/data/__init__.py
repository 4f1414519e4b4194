"""Data sets of text, images and questions. `conf/data/` holds their settings."""

SETS = {  # {kind: names of its data sets}, for error messages
    "text": "sotu, wikitext2, python_topics, ptb or c4",
    "images": "digits, fashion_mnist or imagenet",
    "questions": "everyday or commonsense",
}
LEARNT = {"text": "sotu, wikitext2, ptb or c4", "images": SETS["images"]}  # those with a training split
