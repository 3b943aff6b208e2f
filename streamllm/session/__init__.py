"""Sessions: a conversation in a stream, which can be saved, forked and undone.

dialogue.py  the messages and turns of a conversation, and the text that comes next in it
prompt.py    the token ids of that text
state.py     everything that the continuation of a stream depends on, copied and restored
saving.py    that as a file, written atomically
files.py     the format of the file, and whether it fits a model
window.py    which tokens the model can still see
"""

from streamllm.session.dialogue import Turn
from streamllm.session.files import SessionError

__all__ = ["SessionError", "Turn"]
