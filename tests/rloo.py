"""An independent oracle: the policy gradient of "Bias-Only Adaptation" in plain PyTorch, a row at a time, no padding.

A_i = r_i - mean_{j != i} r_j,     L = -(1 / N_tok) sum_i A_i sum_t log pi(y_it | x, y_i<t)
"""

import torch


def log_probs(model, prompt, completion, temperature=1.0):
    """log pi of every token of a completion, [T]."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def advantages(rewards, group):
    """RLOO: each reward against the mean of the others of its group."""
    found = []
    for start in range(0, len(rewards), group):
        own = rewards[start : start + group]
        found += [r - (sum(own) - r) / (group - 1) for r in own]
    return found


def loss(model, prompts, completions, rewards, group, beta=0.0, reference=None):
    """The loss of one batch; with beta the k3 estimate of KL(policy || reference) is added, token by token."""
    tokens = sum(map(len, completions))
    total = torch.zeros(())
    for prompt, completion, advantage in zip(prompts, completions, advantages(rewards, group), strict=True):
        policy = log_probs(model, prompt, completion)
        total = total - advantage * policy.sum()
        if beta:
            with torch.no_grad():
                first = log_probs(reference, prompt, completion)
            ratio = first - policy
            total = total + beta * (ratio.exp() - ratio - 1).sum()
    return total / tokens


@torch.no_grad()
def sample(model, prompt, length, generator):
    """A completion of that many tokens, drawn naively at temperature 1."""
    ids = list(prompt)
    for _ in range(length):
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
    return ids[len(prompt) :]


def train(model, parameters, prompts, reward, *, steps, group, length, rate, seed=0):
    """The loop: sample, reward, one step of AdamW on `parameters`. Returns the mean reward of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    means = []
    for _ in range(steps):
        rows = [prompt for prompt in prompts for _ in range(group)]
        completions = [sample(model, prompt, length, generator) for prompt in rows]
        rewards = [reward(completion) for completion in completions]
        optimizer.zero_grad()
        loss(model, rows, completions, rewards, group).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        means.append(sum(rewards) / len(rewards))
    return means
