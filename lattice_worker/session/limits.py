"""The limits that the server sets for this worker."""

from dataclasses import dataclass

from lattice_worker.channel import MESSAGE_LIMIT_BYTES


@dataclass(slots=True)
class Limits:
    """Sizes in bytes, which the server states in its welcome. The agent writes them; all others read them.

    Attributes:
        inline_bytes: the largest output that a report carries itself.
        log_bytes: the most output of one attempt that is logged.
        message_bytes: the largest message.
        chunk_bytes: the largest chunk of streamed output; 0 when the server takes no chunks.
        takes_calls: whether the server lets attempts call tasks.
        takes_signals: whether the server lets attempts wait for signals.
        question_bytes: the largest question, and the largest answer; 0 when the server takes no questions.
    """

    inline_bytes: int = 256 * 1024
    log_bytes: int = 1024 * 1024
    message_bytes: int = MESSAGE_LIMIT_BYTES
    question_bytes: int = 0
    chunk_bytes: int = 0
    takes_calls: bool = False
    takes_signals: bool = False
