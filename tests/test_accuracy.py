"""evals/accuracy.py: the accuracy of each row, against all logits at once."""
import pytest
import torch

from data import IGNORE, Example, collate
from evals.accuracy import final_hidden, row_accuracy
from tests.tiny_models import tiny


def test_the_mean_of_the_rows_accuracies():
    model = tiny()
    rows = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist()
            for n in (9, 5, 12)]
    examples = []
    for ids in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([ids]))
        best = model.logits(hidden)[0].argmax(-1).tolist()
        # every third label is the most likely token, and the first two carry no loss
        labels = [IGNORE, IGNORE, *(best[t - 1] if t % 3 == 0 else (best[t - 1] + 1) % 50
                                    for t in range(2, len(ids)))]
        examples.append(Example(ids, labels, [len(ids)]))
    examples.append(Example(rows[0], [IGNORE] * len(rows[0]), [len(rows[0])]))    # not counted
    batch = collate(examples).to(torch.device("cpu"))
    with torch.no_grad(), final_hidden(model) as hidden:
        model(batch.input_ids, batch.position_ids, batch.layout)
    found = row_accuracy(hidden[-1], model, batch)
    want = sum(sum(t % 3 == 0 for t in range(2, len(ids))) / (len(ids) - 2) for ids in rows)
    assert found.tolist() == pytest.approx([want, 3])
