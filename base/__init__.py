"""How the bundled base model was made: emoji drawings in, a small Stable Diffusion pipeline out.

The stages run in this order, each as ``python -m base.NAME`` from the root of the repository or all of them by
``dvc repro base/dvc.yaml``: icons (download), sprites (render), subjects (the demo subjects), autoencoder, tokenizer,
text_encoder, denoiser (the UNet), scorer, judge, quality, card. Their values are in ``base/params.yaml``.
"""
