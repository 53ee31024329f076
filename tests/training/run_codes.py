"""What `test_igpg.py` starts in two processes: the autoencoder and the prior of IGPG on networks of two layouts, one row for each
process, so that they call their models for other layouts, and sometimes one of them more often."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from hf_weightgen.models.modeling_weight_vqvae import WeightVQVAE, WeightVQVAEConfig
from hf_weightgen.training.batches import ZooTensors
from hf_weightgen.training.igpg import DecoderLoss, VQVAELoss, encode_zoo, prior_loss
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.weights.pieces import num_places
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import random


STEPS = 110  # codes are revived twice


def main(folder: Path) -> None:
    generator, shapes = random(0), {"a": {"body": (5, 3)}, "b": {"first": (2, 3), "second": (4,)}}
    weights = [
        {name: torch.randn(size, generator=generator) for name, size in {**shapes[task], "head": (2, 4)}.items()}
        for task in "aaabbb"
    ]
    tokenizer = WeightTokenizer.fit(weights, token_size=4, head=["head"])
    names, prompts = ({t: F.normalize(torch.randn(2, 2, 8, generator=generator), dim=-1) for t in "ab"} for _ in "np")
    zoo = ZooTensors.of(
        tokenizer, weights, list("aaabbb"), names, {t: p[0] for t, p in prompts.items()}, {"a": "a", "b": "b"}
    )
    torch.manual_seed(0)
    accelerator, codes = Accelerator(cpu=True), {"num_codes": 16, "codes_per_token": 2, "embedding_size": 8}
    small = {"hidden_size": 16, "num_attention_heads": 2}
    more = {"num_places": num_places(tokenizer, 4), "place_size": 4, "learns_noise": True}
    vqvae = WeightVQVAE(WeightVQVAEConfig(token_size=4, code_size=4, num_layers=1, **small, **codes, **more))
    prior = IGPGPrior(
        IGPGConfig(num_hidden_layers=1, intermediate_size=32, num_places=more["num_places"], **small, **codes)
    )
    config = LoopConfig(folder, STEPS, train_batch_size=4, lr_warmup_steps=5)
    loss = VQVAELoss(vqvae, zoo, tokenizer, STEPS, gather=accelerator.gather)
    train(accelerator, vqvae, loss, config, "vqvae")

    def function_loss(tokens, truth, index, random):
        return (tokens * zoo.padding_mask[index] - truth).square().mean()

    of_zoo, _ = encode_zoo(vqvae, zoo, tokenizer)
    decoder_loss = DecoderLoss(vqvae, zoo, tokenizer, of_zoo, function_loss, 0.1)
    vqvae.freeze_codes()
    train(accelerator, vqvae, decoder_loss, config, "decoder")
    train(accelerator, prior, lambda m, r: prior_loss(m, of_zoo, zoo, tokenizer, r, 4), config, "prior")
    learned = {f"{n}.{k}": v for n, m in (("vqvae", vqvae), ("prior", prior)) for k, v in m.named_parameters()}
    kept = {name: value.detach().clone() for name, value in learned.items()} | {"usage": loss.usage}
    save_file(kept, folder / f"{accelerator.process_index}-of-{accelerator.num_processes}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
