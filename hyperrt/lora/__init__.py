"""LoRA weights: the layout that a bundle takes, and the files of this and other programs."""
