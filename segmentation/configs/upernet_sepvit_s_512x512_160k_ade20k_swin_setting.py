_base_ = "upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"

model = dict(backbone=_base_.sepvit_small)
