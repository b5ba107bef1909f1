"""The `mimo` command; installed as `modeling_mimo.cli`."""
