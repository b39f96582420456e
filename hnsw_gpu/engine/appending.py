"""Arrays that grow at their end, in time that is in proportion to what is added."""

import numpy as np


def appended(room, used, more):
    """`room` with `more` behind its first `used`; where it does not fit, a larger array.

    The first `used` stay as they are, so what is a view of them may be read meanwhile.
    """
    end = used + len(more)
    if len(room) < end:
        grown = np.empty(max(end, used + used // 4), room.dtype)
        grown[:used] = room[:used]
        room = grown
    room[used:end] = more
    return room
