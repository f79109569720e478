"""A trained critic by itself: its readings are what training sees, whatever it is read together with; refusals."""

import shutil
from pathlib import Path

import pytest
import torch

from dvpo import load_critic
from dvpo.core.risk import cvar
from dvpo.encoding import ChatEncoder
from dvpo.errors import InputError
from dvpo.sampling import Episode, collate
from dvpo.trainer import Trainer
from dvpo.valuation import TrainedCritic
from runs import Parity, trained

PROMPT = [{"role": "user", "content": "2+3="}]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(tmp_path_factory.mktemp("runs") / "dvpo", "steps=2", "critic_optimiser.lr=0.01")


@pytest.fixture(scope="module")
def critic(trainer: Trainer) -> TrainedCritic:
    return load_critic(trainer.folder)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.allclose(one, other, atol=1e-5))


def test_a_reading_is_what_training_sees_and_its_end_is_the_state_before_the_end_token(
    trainer: Trainer, critic: TrainedCritic
) -> None:
    encoder, response = ChatEncoder(trainer.policy.tokenizer), "2+3=5"
    tokens = [*encoder.plain(response), trainer.policy.tokenizer.eos_token_id]
    turns, logprobs = [0] * len(tokens), [0.0] * len(tokens)
    example = Parity().split("id")[0]
    episode = Episode(example, 0, 0, encoder.prompt(PROMPT), tokens, turns, logprobs, terminated=True)
    nothing = torch.zeros(1)
    scores = {"rewards_BT": torch.zeros(1, len(tokens)), "rewarded_B": nothing > 0, "observed_B": nothing}
    rollout = collate([episode], {**scores, "true_B": nothing}, trainer.policy.pad_id, 0)
    with torch.no_grad():
        states_BUD = trainer.critic.states(rollout, trainer.policy)
        before_each_TNM = trainer.critic.values(states_BUD, rollout, trainer.policy, 1.2)[0, :-1]
    (reading,) = critic.read([PROMPT], [response])
    assert reading.tokens == tuple("2+3=5")
    assert reading.heads_UNM.shape == (6, 3, 8)
    assert close(reading.heads_UNM, before_each_TNM)  # T + 1 states are the states before T tokens and the end token
    assert reading.value == pytest.approx(float(before_each_TNM[-1].mean()), abs=1e-5)


def test_a_state_knows_the_tokens_before_it_and_no_other(critic: TrainedCritic) -> None:
    one, other = critic.read([PROMPT, PROMPT], ["2+3=5;#5", "2+3=6;#6"])
    assert close(one.values_U[:5], other.values_U[:5])
    assert not close(one.values_U[5:6], other.values_U[5:6])
    assert close(one.changes_T, one.values_U[1:] - one.values_U[:-1])


def test_what_is_read_together_does_not_matter(critic: TrainedCritic) -> None:
    prompts = [PROMPT, [{"role": "user", "content": "a longer question: 12+34-5="}]] * 3
    responses = ["5", "12+34=46;46-5=41;#41", "", "x", "2+3=5;#5", ""]
    together = critic.read(prompts, responses)
    by_twos = critic.read(prompts, responses, batch_size=2)
    alone = [critic.read([prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    for one, two, three in zip(together, by_twos, alone, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert close(one.heads_UNM, two.heads_UNM)
        assert close(one.heads_UNM, three.heads_UNM)
    # An empty response is worth what the prompt is.
    assert together[2].values_U.tolist() == pytest.approx([float(together[0].values_U[0])], abs=1e-5)
    assert critic.scores(prompts, responses) == pytest.approx([reading.value for reading in together], abs=1e-6)


def test_the_law_is_sorted_and_its_functionals_are_those_of_core(critic: TrainedCritic) -> None:
    (reading,) = critic.read([PROMPT], ["2+3=5"])
    law_M = reading.heads_UNM[-1].mean(dim=0).sort().values
    assert close(reading.law_M, law_M)
    assert reading.lower(0.25) == pytest.approx(float(law_M[:2].mean()))
    assert reading.lower(0.1) == pytest.approx(float(cvar(law_M, 0.1)))
    assert reading.upper(0.25) == pytest.approx(float(law_M[-2:].mean()))
    assert reading.value == pytest.approx(float(law_M.mean()))


def test_a_text_is_a_users_words_unless_it_is_to_stand_as_it_is(critic: TrainedCritic) -> None:
    as_message, as_text, raw = (
        critic.scores([prompt], ["5"], chat=chat)[0]
        for prompt, chat in ((PROMPT, True), ("2+3=", True), ("2+3=", False))
    )
    assert as_message == as_text != raw


def test_a_run_its_checkpoint_and_the_critic_in_that_are_the_same_critic(trainer: Trainer, tmp_path: Path) -> None:
    checkpoint = trainer.folder / "checkpoint-2"
    scores = [
        load_critic(source).scores([PROMPT], ["5"]) for source in (trainer.folder, checkpoint, checkpoint / "critic")
    ]
    assert scores[0] == scores[1] == scores[2]
    named = tmp_path / "critic"  # a run folder may be called so
    shutil.copytree(trainer.folder, named)
    assert load_critic(named).scores([PROMPT], ["5"]) == scores[0]


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=ppo"],
        ["algorithm=cql_ppo"],
        ["algorithm=ppo_hl_gauss"],
        ["algorithm=dvpo_iqn"],
        ["critic.trunk=shared"],
        ["critic.features=true"],
    ],
    ids=lambda settings: settings[0],
)
def test_every_kind_of_critic_reads(tmp_path: Path, settings: list[str]) -> None:
    critic = load_critic(trained(tmp_path / "run", "steps=1", *settings).folder)
    one, other = critic.read([PROMPT, PROMPT], ["2+3=5;#5", ""])
    assert one.heads_UNM.isfinite().all()
    assert len(one.heads_UNM) == 9
    assert close(one.heads_UNM[0], other.heads_UNM[0])


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, critic: TrainedCritic) -> None:
    with pytest.raises(InputError, match="2 prompts for 1 responses: give a prompt for each"):
        critic.read([PROMPT, PROMPT], ["5"])
    with pytest.raises(InputError, match=r"prompt and response 1 have .* more than the model's context of"):
        critic.read([PROMPT, PROMPT], ["5", "1" * 9999])
    with pytest.raises(InputError, match="holds no sound checkpoint"):
        load_critic(tmp_path / "nowhere")
    grpo = trained(tmp_path / "grpo", "steps=1", "algorithm=grpo").folder
    with pytest.raises(InputError, match="has no critic, since algorithm = grpo trains none: take another run"):
        load_critic(grpo)
    told = trained(tmp_path / "told", "steps=1", "critic.privileged=answer").folder
    with pytest.raises(InputError, match="reads the column answer beside the text"):
        load_critic(told)
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "unsaved" / "config.yaml").write_bytes((grpo / "config.yaml").read_bytes())
    with pytest.raises(InputError, match=r"unsaved has no checkpoint yet \(checkpoint.every = \d+\): wait for it"):
        load_critic(tmp_path / "unsaved")
