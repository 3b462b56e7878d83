# SPDX-License-Identifier: Apache-2.0
"""transformers' door: base.generate(**inputs, custom_generate=HERE, mtp_model=HERE, trust_remote_code=True)."""

from mtp_lightning.custom_generate import generate_from

HERE = ''


def generate(model, mtp_model=HERE, **arguments):
    return generate_from(model, mtp_model, **arguments)
