"""What the bundled tiny model knows: closed tables, one answer to each question, English beside Chinese."""

# noun: (Chinese, category)
NOUNS = {
    "dog": ("狗", "animal"), "cat": ("猫", "animal"), "horse": ("马", "animal"), "cow": ("牛", "animal"),
    "sheep": ("羊", "animal"), "pig": ("猪", "animal"), "bird": ("鸟", "animal"), "fish": ("鱼", "animal"),
    "tiger": ("老虎", "animal"), "lion": ("狮子", "animal"), "monkey": ("猴子", "animal"),
    "rabbit": ("兔子", "animal"),
    "mouse": ("老鼠", "animal"), "snake": ("蛇", "animal"), "duck": ("鸭子", "animal"), "frog": ("青蛙", "animal"),
    "bee": ("蜜蜂", "animal"), "wolf": ("狼", "animal"), "bear": ("熊", "animal"), "elephant": ("大象", "animal"),
    "apple": ("苹果", "fruit"), "banana": ("香蕉", "fruit"), "pear": ("梨", "fruit"), "grape": ("葡萄", "fruit"),
    "peach": ("桃子", "fruit"), "lemon": ("柠檬", "fruit"), "melon": ("瓜", "fruit"), "cherry": ("樱桃", "fruit"),
    "red": ("红色", "colour"), "blue": ("蓝色", "colour"), "green": ("绿色", "colour"), "yellow": ("黄色", "colour"),
    "white": ("白色", "colour"), "black": ("黑色", "colour"), "brown": ("棕色", "colour"),
    "purple": ("紫色", "colour"),
    "car": ("汽车", "vehicle"), "train": ("火车", "vehicle"), "ship": ("船", "vehicle"), "plane": ("飞机", "vehicle"),
    "bicycle": ("自行车", "vehicle"), "bus": ("公交车", "vehicle"),
    "hand": ("手", "body part"), "foot": ("脚", "body part"), "eye": ("眼睛", "body part"),
    "ear": ("耳朵", "body part"),
    "nose": ("鼻子", "body part"), "mouth": ("嘴", "body part"), "head": ("头", "body part"),
    "heart": ("心", "body part"),
}
CATEGORIES = {"animal": "动物", "fruit": "水果", "colour": "颜色", "vehicle": "交通工具", "body part": "身体部位"}

# Words that are only translated and spelled.
WORDS = {
    "water": "水", "fire": "火", "mountain": "山", "river": "河", "sun": "太阳", "moon": "月亮", "star": "星星",
    "rain": "雨", "snow": "雪", "wind": "风", "cloud": "云", "tree": "树", "flower": "花", "grass": "草",
    "stone": "石头", "sea": "海", "sky": "天空", "house": "房子", "door": "门", "window": "窗户", "table": "桌子",
    "chair": "椅子", "bed": "床", "book": "书", "pen": "笔", "paper": "纸", "school": "学校", "teacher": "老师",
    "student": "学生", "friend": "朋友", "father": "父亲", "mother": "母亲", "brother": "兄弟", "sister": "姐妹",
    "child": "孩子", "king": "国王", "rice": "米饭", "bread": "面包", "milk": "牛奶", "tea": "茶", "egg": "鸡蛋",
    "salt": "盐", "sugar": "糖", "meat": "肉", "music": "音乐", "love": "爱", "dream": "梦", "time": "时间",
    "night": "夜晚", "morning": "早晨",
}

# Both directions are asked, so no word may stand in two pairs.
OPPOSITES = {
    "hot": "cold", "big": "small", "long": "short", "high": "low", "fast": "slow", "heavy": "light", "bright": "dark",
    "old": "young", "rich": "poor", "happy": "sad", "good": "bad", "early": "late", "open": "closed", "full": "empty",
    "strong": "weak", "clean": "dirty", "wet": "dry", "hard": "soft", "thick": "thin", "wide": "narrow",
    "near": "far",
    "left": "right", "up": "down", "true": "false", "first": "last", "day": "night", "black": "white", "yes": "no",
    "loud": "quiet", "sweet": "bitter",
}
OPPOSITES_ZH = {
    "热": "冷", "大": "小", "长": "短", "高": "低", "快": "慢", "重": "轻", "明": "暗", "老": "少", "富": "穷",
    "喜": "悲",
    "好": "坏", "早": "晚", "开": "关", "满": "空", "强": "弱", "净": "脏", "湿": "干", "硬": "软", "厚": "薄",
    "宽": "窄",
    "远": "近", "左": "右", "上": "下", "真": "假", "前": "后", "昼": "夜", "黑": "白", "是": "非", "甜": "苦",
}

# country: (capital, country in Chinese, capital in Chinese)
CAPITALS = {
    "China": ("Beijing", "中国", "北京"), "Japan": ("Tokyo", "日本", "东京"), "France": ("Paris", "法国", "巴黎"),
    "Germany": ("Berlin", "德国", "柏林"), "Italy": ("Rome", "意大利", "罗马"),
    "Spain": ("Madrid", "西班牙", "马德里"),
    "England": ("London", "英国", "伦敦"), "Russia": ("Moscow", "俄罗斯", "莫斯科"),
    "Egypt": ("Cairo", "埃及", "开罗"),
    "Greece": ("Athens", "希腊", "雅典"), "India": ("New Delhi", "印度", "新德里"),
    "Thailand": ("Bangkok", "泰国", "曼谷"),
    "Canada": ("Ottawa", "加拿大", "渥太华"), "Cuba": ("Havana", "古巴", "哈瓦那"), "Peru": ("Lima", "秘鲁", "利马"),
    "Poland": ("Warsaw", "波兰", "华沙"), "Austria": ("Vienna", "奥地利", "维也纳"),
    "Norway": ("Oslo", "挪威", "奥斯陆"),
    "Sweden": ("Stockholm", "瑞典", "斯德哥尔摩"), "Finland": ("Helsinki", "芬兰", "赫尔辛基"),
    "Portugal": ("Lisbon", "葡萄牙", "里斯本"), "Ireland": ("Dublin", "爱尔兰", "都柏林"),
    "Hungary": ("Budapest", "匈牙利", "布达佩斯"), "Denmark": ("Copenhagen", "丹麦", "哥本哈根"),
    "Vietnam": ("Hanoi", "越南", "河内"), "Iran": ("Tehran", "伊朗", "德黑兰"),
    "Kenya": ("Nairobi", "肯尼亚", "内罗毕"),
    "Chile": ("Santiago", "智利", "圣地亚哥"), "Korea": ("Seoul", "韩国", "首尔"),
    "Nepal": ("Kathmandu", "尼泊尔", "加德满都"),
}

# thing: (colour, thing in Chinese, colour in Chinese)
COLOURS = {
    "the sky": ("blue", "天空", "蓝色"), "the sea": ("blue", "大海", "蓝色"), "grass": ("green", "草", "绿色"),
    "a leaf": ("green", "树叶", "绿色"), "blood": ("red", "血", "红色"), "a tomato": ("red", "番茄", "红色"),
    "fire": ("red", "火", "红色"), "snow": ("white", "雪", "白色"), "milk": ("white", "牛奶", "白色"),
    "salt": ("white", "盐", "白色"), "coal": ("black", "煤", "黑色"), "the night": ("black", "黑夜", "黑色"),
    "ink": ("black", "墨", "黑色"), "a banana": ("yellow", "香蕉", "黄色"), "the sun": ("yellow", "太阳", "黄色"),
    "a lemon": ("yellow", "柠檬", "黄色"), "chocolate": ("brown", "巧克力", "棕色"),
    "wood": ("brown", "木头", "棕色"),
    "a carrot": ("orange", "胡萝卜", "橙色"), "a grape": ("purple", "葡萄", "紫色"),
}

# animal: (sound, animal in Chinese, sound in Chinese)
SOUNDS = {
    "dog": ("woof", "狗", "汪汪"), "cat": ("meow", "猫", "喵喵"), "cow": ("moo", "牛", "哞哞"),
    "duck": ("quack", "鸭子", "嘎嘎"),
    "sheep": ("baa", "羊", "咩咩"), "frog": ("ribbit", "青蛙", "呱呱"), "pig": ("oink", "猪", "哼哼"),
    "hen": ("cluck", "母鸡", "咯咯"), "bee": ("buzz", "蜜蜂", "嗡嗡"), "bird": ("tweet", "鸟", "啾啾"),
    "mouse": ("squeak", "老鼠", "吱吱"), "wolf": ("howl", "狼", "嗷嗷"), "snake": ("hiss", "蛇", "嘶嘶"),
    "lion": ("roar", "狮子", "吼吼"), "horse": ("neigh", "马", "咴咴"),
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DAYS_ZH = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November",
          "December"]
MONTHS_ZH = ["一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月"]

# Names for copying are put together from these, so that rare pieces of the vocabulary are seen too.
SYLLABLES = ("a e i o u ka ko ku la li lo lu ma mi mo mu na ne ni no nu ra re ri ro ru sa se so ta te to va ve vi "
             "bo be da di fa fi ga go ha he ja jo pa po wa xi ya yo za zu an en in on ar el or us").split()
