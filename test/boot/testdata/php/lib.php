<?php function greet(): string { return strtolower('World'); }
