"""What every script passes first: a machine on which nothing here runs is told so in one line.
Older Pythons get this far too, so this file and the scripts keep to the syntax of 3.8."""
import sys

if sys.version_info < (3, 11) or sys.platform == 'win32':
    print(f'error: Python 3.11 or later is needed, and on Windows its Linux subsystem (WSL); '
          f'this is {sys.platform} with {sys.version.split()[0]}', file=sys.stderr)
    sys.exit(2)
if hasattr(sys.stdout, 'reconfigure'):  # a terminal without UTF-8 shows a ? in a title
    sys.stdout.reconfigure(errors='replace')
