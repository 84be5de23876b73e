"""Lists of tensor sizes to draw from."""

from hypothesis import strategies as st

# Lengths around the boundaries of a vector, an alignment, a partial sum and a block.
SIZES = st.sampled_from([0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 1000, 8191, 8192, 8193, 20000])
SIZE_LISTS = st.one_of(
    st.lists(SIZES, min_size=0, max_size=6),
    st.lists(SIZES, min_size=1, max_size=4).map(lambda sizes: [*sizes, 0]),
    st.just([3] * 40),
)

# One less and one more than what a program or a tile of any kernel takes.
SIZES_AT_BOUNDARIES = [n + d for n in (512, 1024, 2048, 4096) for d in (-1, 0, 1)]
