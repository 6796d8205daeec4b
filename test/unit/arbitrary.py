"""What may come in from outside: anything that YAML, JSON or a command line gives."""

import ipaddress

from hypothesis import strategies as st

_ADDRESS_LIKE = st.from_regex(r"\A[0-9a-fA-F:.]{1,30}(%[a-z0-9]{1,4})?(/[0-9]{1,3})?\Z")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.binary(max_size=10),
    _ADDRESS_LIKE,
    st.from_regex(r"\A[0-9]{1,13}[smhdwy]?([0-9]{1,3}[smhdw])?\Z"),
    st.from_regex(r"\A[0-9]{1,7} ?/ ?(second|minute|hour|day|week)\Z"),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.integers(), inner, max_size=4)
    ),
    max_leaves=10,
)
addresses = st.ip_addresses().filter(lambda one: getattr(one, "ipv4_mapped", None) is None)


@st.composite
def networks(draw, version):
    address = draw(st.ip_addresses(v=version))
    prefix = draw(st.integers(0 if version == 4 else 1, address.max_prefixlen))
    network = ipaddress.ip_network((address, prefix), strict=False)
    return str(network)
