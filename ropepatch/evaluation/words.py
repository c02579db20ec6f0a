"""Common English words in lower case, for keys and word lists. No word is listed twice or begins another.

The lists are part of what a seed means: a change makes old and new results incomparable.
"""

from __future__ import annotations

_ADJECTIVES = """
able ancient angry big bitter black blue bold brave bright broad brown busy calm careful cheap clean clear clever
cold common cool curious dark deep dry eager early easy empty fair famous fast fine firm flat fresh full gentle
golden good grand gray great green happy hard heavy high honest hot huge humble kind large late light little long
loud lucky narrow new nice old open orange pale patient plain poor pretty proud pure purple quick quiet rapid rare
ready red rich ripe rough round sad safe sharp short silent silver simple slow small smooth soft solid sour steady
strange strong sudden sweet tall tender thick thin tiny true vast warm weak wet white wide wild wise wooden yellow
young
"""

_NOUNS = """
acorn anchor apple arrow autumn bank basket beach bell bench bird boat book bottle bread bridge brook bucket button
cabin candle castle chair cherry church circle city cloud coat coin copper corner cotton country cousin crown dance
desert dinner doctor door dream drum eagle earth engine evening farmer feather fence field finger fish flower
forest friend garden gate glass glove hammer harbor harvest hill honey horse house island jacket journey kettle
king kitchen ladder lake lamp lantern leaf lemon letter library lion market meadow mirror moon morning mountain
music needle night ocean orchard paper pebble pencil picture pillow planet pocket pony queen question rabbit rain
ribbon river road rope sailor salt school shadow ship shoe shop silk sister sky snow song spoon spring star stone
story street summer table teacher temple thunder tiger tower town train tree valley village violin wagon water
whistle window winter wolf wool
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
