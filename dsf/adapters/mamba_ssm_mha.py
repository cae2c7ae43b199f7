"""mamba_ssm: its attention layer, which hybrids put between their Mamba layers."""

from __future__ import annotations

from dsf.adapters._contract import Built, Visit
from dsf.adapters._tapped import refuse_inference_params
from dsf.adapters.transformers_own_attention import OwnAttention


class Mha(OwnAttention):
    """Softmax attention through scaled_dot_product_attention, values repeated for shared heads.

    The short convolution of d_conv and the MLP of mlp_dim lie before and beside it.
    """

    name = "mamba_ssm.mha"
    covers = ("mamba_ssm: MHA",)
    tapped = "scaled_dot_product_attention"
    decodes = False
    classes = frozenset({"mamba_ssm.modules.mha:MHA"})
    releases = "mamba_ssm 2.3.2.post1"

    def build(self, visit: Visit) -> list[Built]:
        """As for transformers' layers; a cache that the layer writes on in place is refused."""
        refuse_inference_params(visit)
        return super().build(visit)


ADAPTERS = [Mha]
