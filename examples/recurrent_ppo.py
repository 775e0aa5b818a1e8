"""Recurrent policy optimisation (PPO, Schulman et al. 2017) on a task that cannot be solved without memory.

    python examples/recurrent_ppo.py

A cue, left or right, shows in the first step of an episode; some steps later, at the junction, the agent must turn that way. Episodes end
at different times inside a rollout. Acting, a stream takes one step at a time and forgets where an episode begins; learning, the whole
rollout goes through the layer in one call, and ``reset_mask`` says where episodes begin.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import rnnkernels


class Corridors:
    """Many corridors at once: observations are (cue left, cue right, at the junction)."""

    def __init__(self, count: int, longest: int) -> None:
        self.count, self.longest = count, longest
        self.left, self.cue = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        self.begins = torch.ones(count, dtype=torch.bool)

    def observe(self) -> Tensor:
        fresh = torch.randint(2, self.longest, (self.count,))
        self.left = torch.where(self.begins, fresh, self.left)
        self.cue = torch.where(self.begins, torch.randint(2, (self.count,)), self.cue)
        shown = nn.functional.one_hot(self.cue, 2) * self.begins.unsqueeze(1)
        return torch.cat([shown, (self.left == 0).unsqueeze(1)], dim=1).float()

    def act(self, action: Tensor) -> Tensor:
        """Rewards: at the junction 1 for the right turn."""
        ends = self.left == 0
        reward = (ends & (action == self.cue)).float()
        self.left, self.begins = self.left - 1, ends
        return reward


class Agent(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.memory = rnnkernels.LSTM(3, hidden)
        self.policy, self.value = nn.Linear(hidden, 2), nn.Linear(hidden, 1)

    def heads(self, h: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(logits=self.policy(h)), self.value(h).squeeze(-1)


@torch.no_grad()
def rollout(agent: Agent, world: Corridors, stream: rnnkernels.Stream, steps: int) -> dict[str, Tensor]:
    """What happened, each ``[T, B]`` but the observations ``[T, B, 3]``, and the states that it began with."""
    state = stream.state
    seen: dict[str, list[Tensor]] = {name: [] for name in ("observation", "begins", "action", "log_prob", "value", "reward")}
    for _ in range(steps):
        begins, observation = world.begins, world.observe()
        stream.reset(begins)
        odds, value = agent.heads(stream.step(observation))
        action = odds.sample()
        reward = world.act(action)
        for name, t in zip(seen, (observation, begins, action, odds.log_prob(action), value, reward), strict=True):
            seen[name].append(t)
    return {**{name: torch.stack(ts) for name, ts in seen.items()}, "h": state[0], "c": state[1]}


def returns(batch: dict[str, Tensor], discount: float = 0.95) -> Tensor:
    """What each step still earned until its episode ended; past the rollout's end, nothing."""
    total, found = torch.zeros_like(batch["reward"][0]), []
    ends = torch.cat([batch["begins"][1:], torch.zeros_like(batch["begins"][:1])])
    for reward, end in zip(batch["reward"].flip(0), ends.flip(0), strict=True):
        total = reward + discount * total.masked_fill(end, 0)
        found.append(total)
    return torch.stack(found).flip(0)


def loss(agent: Agent, batch: dict[str, Tensor], clip: float = 0.2) -> tuple[Tensor, Tensor]:
    """The clipped objective, and how far the log-probabilities are from those at the time of acting."""
    h, _ = agent.memory(batch["observation"], (batch["h"], batch["c"]), reset_mask=batch["begins"])
    odds, value = agent.heads(h)
    log_prob, target = odds.log_prob(batch["action"]), returns(batch)
    advantage = target - batch["value"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    ratio = (log_prob - batch["log_prob"]).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    total = -gain.mean() + 0.5 * (value - target).pow(2).mean() - 0.01 * odds.entropy().mean()
    return total, (log_prob - batch["log_prob"]).abs().max().detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rollouts")
    parser.add_argument("--steps", type=int, default=32, help="steps a rollout")
    parser.add_argument("--corridors", type=int, default=64, help="corridors side by side")
    parser.add_argument("--longest", type=int, default=8, help="no corridor is longer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    agent, world = Agent(32), Corridors(options.corridors, options.longest)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3)
    stream = agent.memory.stream(options.corridors)
    for number in range(1, options.rounds + 1):
        batch = rollout(agent, world, stream, options.steps)
        for epoch in range(4):
            total, apart = loss(agent, batch)
            if epoch == 0 and number == 1:
                print(f"log-probabilities, acting and learning: {apart.item():.1e} apart at most")
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
        if number % 10 == 0:
            turns = batch["observation"][..., 2].sum()
            print(f"rollout {number}: {(batch['reward'].sum() / turns).item():.2f} of the turns right")


if __name__ == "__main__":
    main()
