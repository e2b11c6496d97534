_base_ = "fpn_sepvit_t_512x512_80k_ade20k.py"

model = dict(backbone=_base_.sepvit_small)
