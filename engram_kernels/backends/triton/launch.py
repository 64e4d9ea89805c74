"""What every launch tells Triton's compiler."""

# A fused product and sum is written `tl.fma`; the compiler makes none of its own. Where it does, threads that
# hold the same sum round it differently after a shuffle, and what is stored depends on which of them comes
# last; two kernels with one formula differ in the last bit; and so do Triton's versions, of which 3.10 turns
# this off by itself.
OPTIONS = {"enable_fp_fusion": False}
