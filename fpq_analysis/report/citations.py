"""BibTeX of the paper, of this software, and of the methods that the runs used."""

from __future__ import annotations

from collections.abc import Iterable

from fpq_analysis import __version__

TITLE = "fpq_analysis: Hessian and loss-landscape analysis of quantized networks"
AUTHORS = "The fpq_analysis authors"

PAPER = """@article{pang2025stabilizing,
  title   = {Stabilizing Quantization-Aware Training by Implicit-Regularization on {Hessian} Matrix},
  author  = {Pang, Junbiao and Cai, Tianyang},
  journal = {arXiv preprint arXiv:2503.11159},
  year    = {2025}
}"""

SOFTWARE = f"""@software{{fpq_analysis,
  title   = {{{TITLE}}},
  author  = {{{{{AUTHORS}}}}},
  version = {{{__version__}}}
}}"""

METHODS = {
    "lsq": """@inproceedings{esser2020lsq,
  title     = {Learned Step Size Quantization},
  author    = {Esser, Steven K. and McKinstry, Jeffrey L. and Bablani, Deepika and Appuswamy, Rathinakumar and
               Modha, Dharmendra S.},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}""",
    "lsq+": """@inproceedings{bhalgat2020lsqplus,
  title     = {{LSQ+}: Improving Low-Bit Quantization through Learnable Offsets and Better Initialization},
  author    = {Bhalgat, Yash and Lee, Jinwon and Nagel, Markus and Blankevoort, Tijmen and Kwak, Nojun},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year      = {2020}
}""",
    "pact": """@article{choi2018pact,
  title   = {{PACT}: Parameterized Clipping Activation for Quantized Neural Networks},
  author  = {Choi, Jungwook and Wang, Zhuo and Venkataramani, Swagath and Chuang, Pierce I-Jen and
             Srinivasan, Vijayalakshmi and Gopalakrishnan, Kailash},
  journal = {arXiv preprint arXiv:1805.06085},
  year    = {2018}
}""",
    "kd": """@article{hinton2015distilling,
  title   = {Distilling the Knowledge in a Neural Network},
  author  = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year    = {2015}
}""",
    "sam": """@inproceedings{foret2021sam,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}""",
}


def bibtex(methods: Iterable[str]) -> str:
    """The entries that a text about runs of these methods needs."""
    used = set(methods)
    if used - {"fp", "lsq+", "pact"}:  # all others are built on LSQ
        used.add("lsq")
    return "\n\n".join([PAPER, SOFTWARE, *(entry for name, entry in METHODS.items() if name in used)])
