"""MaskSub inside other trainers. Each module needs the package that it is named after: import the one you use.

A loop of one's own needs none of them: :class:`augsub.SubModelObjective` is two lines in it, with Hugging Face
Accelerate too (``backward=accelerator.backward``).
"""
