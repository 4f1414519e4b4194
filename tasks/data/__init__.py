"""Where text, images and questions come from. `conf/data/` names the sets."""
