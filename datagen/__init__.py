"""From a task description to a dataset and its registry entry, through the `openai` client. Never imports torch.

settings      what can be set; endpoint: the server and its key
plan          the system message, and the topics, people, difficulties and forms that examples are spread over
documents     documents and seed examples as pieces to build on; chunking: where they are cut
grid          the independent requests that plan, pieces and a seed mean; prompts: their wording
provider      one request: retries, what the server accepts; limiter: how many at once; budget: what they may cost
replies       what a reply says; reply_log: the log of all of them
curation      which replies become rows; filtering: by similarity (rouge), language, length; split: which are held out
outputs       the files made from it, with preview, card and push
make_dataset  ties these together; job: the asking; batch_api: through OpenAI's Batch API
from_python   `tunewright.datagen(...)`, which this module is called as
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *overrides: Any, **settings: Any) -> Any:
        from tunewright.datagen.from_python import datagen

        return datagen(*overrides, **settings)


sys.modules[__name__].__class__ = _Room
