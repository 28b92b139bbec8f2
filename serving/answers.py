"""One answer as it grows: tokens become text, up to a stop string, with thought and tool calls.

    choice = Choice(tokenizer, stop=["\\n\\n"], template=template)
    for token in tokens:
        print(choice.push(token))               # [("thought" | "text", piece), …]
    print(choice.end("length"), choice.finish_reason, choice.calls)

What is streamed, joined, is what is answered at once: both come from the same pieces. With tools
the text is held back to the end, as it may turn out to be a call.

Requires: text/read_calls.py, text/tokenizer.py (TextStream).
Next: serving/service.py.
"""
from templates import Template
from text.read_calls import ThoughtSplitter, begun, find_calls, marking_tokens
from text.tokenizer import TextStream, Tokenizer

Piece = tuple[str, str]     # "thought" or "text", and some of it


class Choice:
    """An answer of a request.

    stop: texts that end it and are no part of it. template: of a chat; without one, marks of
    thoughts and calls are text. tools: that were offered, see text_arguments.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str], template: Template | None = None,
                 tools: dict | None = None):
        keep = marking_tokens(template, tokenizer, bool(tools)) if template else frozenset()
        self.stream = TextStream(tokenizer, skip_special_tokens=True, keep=keep)
        self.splitter = ThoughtSplitter(template.thought if template else ("", ""))
        self.stop = stop
        self.template = template
        self.tools = tools or {}
        self.held = ""              # may be the beginning of a stop text
        self.pieces = []            # all that push and end have returned
        self.text_of_call = ""      # the text, where tools were offered
        self.calls = []
        self.tokens = 0
        self.finish_reason = None   # stop, length or tool_calls
        self.token_logps = []       # see Row.top_logps, of the tokens of the text

    def push(self, token: int) -> list[Piece]:
        """Add a token; returns the pieces that are now certain. Sets finish_reason at a stop."""
        self.tokens += 1
        return self.release(self.certain(self.stream.push(token)))

    def end(self, reason: str) -> list[Piece]:
        """The rest of the answer; reason: why it ended, unless a stop text did."""
        rest = ""
        if not self.finish_reason:
            rest = self.certain(self.stream.flush())
        if not self.finish_reason:
            rest += self.held
            self.finish_reason = reason
        pieces = self.release(rest) + self.release(None)
        if self.text_of_call:
            text, self.calls = find_calls(self.text_of_call, self.template.tool_format.name,
                                          self.tools)
            if self.calls:
                self.finish_reason = "tool_calls"
            pieces += self.keep([("text", text)] if text else [])
        return pieces

    def certain(self, piece: str) -> str:
        """Add text; returns what stands before a stop text and cannot begin one."""
        self.held += piece
        ends = [place for text in self.stop if (place := self.held.find(text)) >= 0]
        if ends:
            self.finish_reason = "stop"
            self.held = self.held[:min(ends)]
            kept = 0
        else:
            kept = max((begun(self.held, text) for text in self.stop), default=0)
        sure = self.held[:len(self.held) - kept]
        self.held = self.held[len(sure):]
        return sure

    def release(self, text: str | None) -> list[Piece]:
        """Split text into thought and answer; None: its end."""
        pieces = self.splitter.flush() if text is None else self.splitter.push(text)
        if self.tools:
            self.text_of_call += "".join(text for kind, text in pieces if kind == "text")
            pieces = [piece for piece in pieces if piece[0] == "thought"]
        return self.keep(pieces)

    def keep(self, pieces: list[Piece]) -> list[Piece]:
        self.pieces += pieces
        return pieces

    def whole(self, kind: str) -> str:
        """The thought or the text so far."""
        return "".join(text for found, text in self.pieces if found == kind)
