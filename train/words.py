"""Words that needles' keys are made of: adjective-noun, as in RULER, whose own lists (the package wonderwords) are longer."""
# ruff: noqa: SIM905, as a list of one word a line would fill pages

ADJECTIVES = tuple(
    """
    able ancient angry bitter blue bold brave bright broad brown busy calm careful cheap clean clear clever cold
    common cool cruel curious dark dear deep dry dull eager early easy empty fair false famous fast fierce final
    fine firm flat fond fresh gentle glad golden good grand grave great green grey happy hard heavy high honest hot
    huge humble idle keen kind large late lazy light little lively lonely long loud low lucky mild narrow neat new
    noble odd old open pale patient plain pleasant poor proud pure quick quiet rapid rare ready red rich rough round
    royal sad safe secret serious sharp short silent silver simple slow small smooth soft solid sour steady steep
    stiff strange strong sudden sweet tall tame tender thick thin tidy tiny true vast warm weak wet white whole wide
    wild wise yellow young
    """.split()
)

NOUNS = tuple(
    """
    acre apple arm arrow badge bag ball bank barn basket bath bean bear bed bell belt bench berry bird boat bone
    book boot bottle bowl box branch bread brick bridge brush bucket button cabin cake camp candle card carpet cart
    castle cat chain chair cheese chest circle clock cloud coach coast coat coin copper corner cottage cow cradle
    crown cup curtain desk dish dog door drawer dress drum duck eagle egg engine farm feather fence field finger
    fire fish flag floor flower forest fork fox frame garden gate glass glove goat grain hall hammer harbour hat
    hill honey hook horn horse hotel house island jacket jar jewel kettle key kitchen knife ladder lake lamp leaf
    lemon letter lion lock map market meadow mill mirror moon mountain mouse nail needle nest net oak ocean onion
    orange oven owl page palace paper path pearl pen picture pig pillow pin pipe plate pocket pond pot prison purse
    rabbit rain ring river road roof root rope rose sail salt school scissors seed shed sheep shelf shell ship shirt
    shoe shop silk sky snow soap sofa spade spoon spring square stable star station stick stone street sugar sun
    table tail teapot temple thread throne ticket tower town tree trunk umbrella valley village violin wagon wall
    watch water well wheel window wing wire wolf wood yard
    """.split()
)
