"""How the package meets detectron2, the released code's names and the user's own modules."""
