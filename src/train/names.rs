//! Tables: concepts of emojibase that people do not distinguish, and common names of the others.

/// Everyday concepts are those of `EVERYDAY_GROUPS` except clock faces and these. The rule is use,
/// not ease: of several concepts that differ only by a phase, state, direction or mark, the one
/// that a person would ask for by name stays.
pub(super) const NEAR_DUPLICATES: &str = "\
    new moon; waxing crescent moon; first quarter moon; waxing gibbous moon; waning gibbous moon; last quarter moon; \
    waning crescent moon; new moon face; first quarter moon face; last quarter moon face; full moon face; \
    sun behind small cloud; sun behind large cloud; snowman without snow; umbrella with rain drops; \
    globe showing Americas; globe showing Asia-Australia; globe with meridians; \
    e-mail; incoming envelope; envelope with arrow; outbox tray; \
    closed mailbox with lowered flag; open mailbox with raised flag; open mailbox with lowered flag; \
    oncoming bus; oncoming police car; oncoming taxi; oncoming automobile; high-speed train; tram car; \
    airplane departure; airplane arrival; hourglass not done; front-facing baby chick; \
    muted speaker; speaker low volume; speaker medium volume; bell with slash; musical notes; \
    mobile phone with arrow; low battery; camera with flash; magnifying glass tilted right; \
    page with curl; bookmark tabs; chart increasing with yen; open file folder; tear-off calendar; spiral calendar; \
    round pushpin; linked paperclips; locked with pen; locked with key; \
    love hotel; Japanese post office; admission tickets";

/// `label: canonical name, synonyms` where the label of emojibase is not what a person would type,
/// or not all of it.
pub(super) const NAMES: &str = "\
    automobile: car, automobile; sport utility vehicle: SUV; articulated lorry: truck, lorry; delivery truck: delivery van; \
    minibus: van, minibus; fire engine: fire truck, fire engine; locomotive: steam train, locomotive; metro: subway train; \
    light rail: light rail train; motor scooter: scooter, motor scooter; bicycle: bicycle, bike; motorway: highway, motorway; \
    manual wheelchair: wheelchair; motorized wheelchair: electric wheelchair; racing car: race car, racing car; \
    auto rickshaw: rickshaw, tuk tuk; ring buoy: life buoy, lifebuoy; passenger ship: cruise ship; motor boat: motorboat; \
    flying saucer: UFO, flying saucer; airplane: airplane, plane, jet; small airplane: small airplane, propeller plane; \
    aerial tramway: gondola lift, aerial tramway; mountain cableway: cable car; fuel pump: gas pump, fuel pump; \
    police car light: siren, police light; horizontal traffic light: horizontal traffic light; \
    vertical traffic light: traffic light; construction: construction barrier; luggage: suitcase, luggage; \
    bellhop bell: hotel bell, bellhop bell; station: train station; railway track: railway track, railroad; \
    hourglass done: hourglass; timer clock: timer; mantelpiece clock: mantel clock, clock; watch: watch, wristwatch; \
    ringed planet: planet with a ring, Saturn; high voltage: lightning bolt; droplet: water drop, droplet; \
    water wave: wave, ocean wave; sun with face: sun with a face; fire: fire, flame; milky way: Milky Way, galaxy; \
    cloud with lightning and rain: thunderstorm; sun behind cloud: sun behind a cloud; cloud with rain: rain cloud; \
    sun behind rain cloud: sun behind a rain cloud; cloud with snow: snow cloud; cloud with lightning: thundercloud; \
    umbrella on ground: parasol, beach umbrella; foggy: foggy city; globe showing Europe-Africa: globe, earth; \
    mount fuji: Mount Fuji; beach with umbrella: beach; snow-capped mountain: snowy mountain; houses: group of houses; \
    house with garden: house with a garden; classical building: temple with columns, classical building; \
    building construction: construction site; derelict house: abandoned house; hindu temple: Hindu temple; \
    shinto shrine: torii gate, Shinto shrine; kaaba: Kaaba; Tokyo tower: Tokyo Tower; night with stars: starry night; \
    sunrise over mountains: sunrise over mountains; carousel horse: carousel horse, carousel; playground slide: slide; \
    hot springs: hot spring; bridge at night: bridge at night, bridge; \
    monkey face: monkey face; dog face: dog face, puppy; cat face: cat face, kitten; service dog: service dog; \
    lady beetle: ladybug, ladybird; honeybee: bee, honeybee; blowfish: pufferfish, blowfish; T-Rex: T-Rex, tyrannosaurus; \
    sauropod: dinosaur, brontosaurus; two-hump camel: two-humped camel; camel: camel, dromedary; ewe: sheep, ewe; \
    spouting whale: spouting whale; spiral shell: seashell, shell; baby chick: chick, baby chick; bug: caterpillar, bug; \
    black bird: crow, raven, black bird; turtle: turtle, tortoise; hippopotamus: hippopotamus, hippo; \
    rhinoceros: rhinoceros, rhino; mouse: mouse; microbe: microbe, germ; hatching chick: hatching chick; \
    deciduous tree: tree, deciduous tree; evergreen tree: pine tree, fir tree; leafless tree: bare tree; \
    sheaf of rice: sheaf of rice; fallen leaf: autumn leaf, fallen leaf; seedling: seedling, sprout; nest with eggs: nest with eggs; \
    leaf fluttering in wind: green leaf; four leaf clover: four-leaf clover; blossom: yellow flower; empty nest: empty nest, nest; \
    mushroom: mushroom, toadstool; herb: herb; tangerine: orange, tangerine; kiwi fruit: kiwi; ear of corn: corn cob, ear of corn; \
    eggplant: eggplant, aubergine; hot pepper: chili pepper, hot pepper; leafy green: lettuce, kale; ginger root: ginger; \
    pea pod: pea pod; root vegetable: beet, turnip; baguette bread: baguette; poultry leg: chicken leg, drumstick; \
    cut of meat: steak; cheese wedge: piece of cheese, cheese; hamburger: hamburger, burger; shallow pan of food: paella; \
    pot of food: pot of stew; cooking: fried egg, frying pan; bowl with spoon: bowl of porridge; green salad: salad; \
    steaming bowl: bowl of noodles, ramen; canned food: can of food, tin can; cooked rice: bowl of rice, rice; \
    curry rice: curry with rice, curry; fried shrimp: fried shrimp; soft ice cream: ice cream cone; \
    ice cream: bowl of ice cream; doughnut: donut, doughnut; custard: pudding, custard; bento box: bento box, bento; \
    hot beverage: cup of coffee, coffee; teacup without handle: cup of green tea; sake: sake bottle and cup; \
    bottle with popping cork: champagne bottle; wine glass: glass of wine, wine glass; cocktail glass: cocktail, martini; \
    beer mug: mug of beer, beer; tumbler glass: glass of whiskey; cup with straw: cup with a straw; ice: ice cube; \
    beverage box: juice box; fork and knife with plate: plate with fork and knife, plate; kitchen knife: kitchen knife, knife; \
    mate: mate drink; butter: butter; takeout box: takeout box; stuffed flatbread: gyro; \
    soccer ball: soccer ball, football; tennis: tennis ball, tennis racket; flying disc: frisbee, flying disc; \
    ping pong: ping pong paddle, table tennis; bowling: bowling ball, bowling; badminton: badminton racket, shuttlecock; \
    flag in hole: golf flag, golf hole; american football: American football; cricket game: cricket bat; \
    field hockey: field hockey stick; ice hockey: ice hockey stick; lacrosse: lacrosse stick; martial arts uniform: karate uniform; \
    goal net: goal net, soccer goal; fishing pole: fishing rod, fishing pole; sled: sled, sledge; \
    bullseye: target, bullseye, dartboard; pool 8 ball: 8 ball, billiard ball; video game: game controller, gamepad; \
    game die: die, dice; puzzle piece: puzzle piece, jigsaw piece; mirror ball: disco ball, mirror ball; \
    nesting dolls: matryoshka doll; heart suit: heart; spade suit: spade; diamond suit: diamond suit; club suit: club suit; \
    chess pawn: chess pawn, pawn; joker: joker card; mahjong red dragon: mahjong tile; performing arts: theater masks; \
    framed picture: framed picture, painting; artist palette: palette, artist palette; thread: spool of thread; \
    sewing needle: needle and thread, sewing needle; yarn: ball of yarn; jack-o-lantern: jack-o'-lantern, Halloween pumpkin; \
    wrapped gift: gift, present; carp streamer: koi flag, carp streamer; moon viewing ceremony: moon viewing; ribbon: ribbon, bow; \
    glasses: glasses, eyeglasses; t-shirt: t-shirt, tee shirt; necktie: tie, necktie; socks: socks, pair of socks; \
    woman’s clothes: blouse; one-piece swimsuit: swimsuit; briefs: swim briefs; folding hand fan: hand fan, folding fan; \
    thong sandal: flip-flop, sandal; man’s shoe: shoe; running shoe: sneaker, running shoe; flat shoe: flat shoe; \
    high-heeled shoe: high heel, high-heeled shoe; hair pick: comb, hair pick; woman’s hat: sun hat; \
    billed cap: cap, baseball cap; rescue worker’s helmet: rescue helmet; backpack: backpack, rucksack; clutch bag: clutch bag; \
    gem stone: diamond, gem, gemstone; prayer beads: prayer beads; speaker high volume: speaker; \
    loudspeaker: loudspeaker; postal horn: post horn; studio microphone: studio microphone; level slider: slider control; \
    headphone: headphones; musical keyboard: piano, piano keyboard; long drum: conga drum; musical note: musical note; \
    mobile phone: phone, smartphone, mobile phone; telephone receiver: phone receiver; electric plug: plug, electric plug; \
    desktop computer: computer, desktop computer; computer disk: minidisc; optical disk: CD, compact disc; dvd: DVD; \
    television: television, TV; magnifying glass tilted left: magnifying glass; movie camera: movie camera; \
    light bulb: light bulb, lightbulb; flashlight: flashlight, torch; red paper lantern: paper lantern, red lantern; \
    diya lamp: oil lamp; videocassette: video tape, VHS tape; notebook with decorative cover: decorated notebook; \
    closed book: book, red book; page facing up: sheet of paper, page; books: stack of books, books; label: tag, label; \
    money with wings: money with wings; dollar banknote: dollar bill, dollar banknote; chart increasing: rising chart; \
    chart decreasing: falling chart; inbox tray: inbox tray; package: cardboard box, package, parcel; \
    closed mailbox with raised flag: mailbox; ballot box with ballot: ballot box; black nib: pen nib; memo: memo, note; \
    pen: ballpoint pen, pen; card index: card index; wastebasket: trash can, wastebasket; straight ruler: ruler; \
    triangular ruler: set square, triangle ruler; card file box: file box; file folder: folder, file folder; \
    locked: padlock, lock; unlocked: open padlock, open lock; pick: pickaxe; carpentry saw: saw, hand saw; gear: gear, cogwheel; \
    crossed swords: crossed swords, swords; link: chain link; white cane: white cane; alembic: glass flask; dna: DNA helix, DNA; \
    drop of blood: drop of blood, blood drop; adhesive bandage: bandage, plaster; x-ray: x-ray; \
    couch and lamp: couch, sofa; roll of paper: roll of toilet paper, toilet paper; lotion bottle: lotion bottle, shampoo bottle; \
    mouse trap: mousetrap; soap: bar of soap, soap; shower: shower; headstone: gravestone, tombstone; \
    nazar amulet: evil eye amulet; moai: Easter Island statue, moai; placard: protest sign; identification card: ID card; \
    satellite antenna: satellite dish; computer mouse: computer mouse; hook: hook; syringe: syringe, needle; \
    bubbles: soap bubbles; gloves: gloves, pair of gloves; coat: coat, jacket; jeans: jeans, trousers; \
    reminder ribbon: awareness ribbon; trophy: trophy, trophy cup; woman’s sandal: woman's sandal; party popper: party popper";

/// The entries of one of these tables.
pub(super) fn entries(table: &str) -> impl Iterator<Item = &str> {
    table.split(';').map(str::trim)
}
