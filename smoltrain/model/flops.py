"""How much a decoder computes."""


def flops_per_token(parameters: int, layers: int, width: int, sequence_length: int) -> float:
    """Floating-point operations of forward and backward: 6 N + 12 L D T, attention counted as if it were not causal.

    Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B.
    """
    return 6 * parameters + 12 * layers * width * sequence_length
