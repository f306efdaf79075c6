"""The words of the recall task's keys: an adjective and a noun each, 48 x 48 = 2304 keys in all."""

_ADJECTIVES = """
amber bold brave bright broad calm clean clear cold cool crisp dark deep dry early empty fair fast fine firm
fresh gentle golden grand green happy heavy humble icy keen large light loud mild narrow neat odd pale plain
proud quick quiet rapid rare red rich round sharp
"""
_NOUNS = """
anchor apple arrow badge basin beacon bell bird boat bottle bridge brook cabin candle castle chair cliff cloud
coin crown drum eagle falcon fern field flute forest fox garden gate harbor hill lamp lantern leaf maple meadow
mirror mountain orchard owl pebble pine river rose sail tower valley
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
