"""What every script passes first: a machine on which nothing here runs is told so in one line.
Older Pythons get this far too, so this file and the scripts keep to the syntax of 3.8."""
import sys

missing = ''
if sys.version_info < (3, 11):
    missing = 'Python 3.11 or later is needed; this is ' + sys.version.split()[0]
if sys.platform == 'win32':
    missing = 'Windows cannot lock files as it is done here; its Linux subsystem (WSL) can'
if missing:
    print('error: ' + missing, file=sys.stderr)
    sys.exit(2)
if hasattr(sys.stdout, 'reconfigure'):  # a terminal without UTF-8 shows a ? in a title
    sys.stdout.reconfigure(errors='replace')
